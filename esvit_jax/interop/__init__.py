"""Other people's formats: checkpoints in, backbones out."""
