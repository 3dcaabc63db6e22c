"""What one sees of a run: metrics on disk, progress, throughput, collapse monitors.

Nothing here touches the training state, and only process 0 should write or print.
"""
