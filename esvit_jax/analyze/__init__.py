"""Looking at a run and at what a backbone sees: figures, attention, correspondences."""
