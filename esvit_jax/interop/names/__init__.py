"""Names of tensors in files: one file a family of backbones."""
