"""`esvit bench`: how fast the training step, its parts, the losses and the input are here."""
