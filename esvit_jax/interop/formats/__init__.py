"""What backbones are exported to: one file a format."""
