"""Images in: sources of records, their decoding into canvases, and views cut on the device."""
