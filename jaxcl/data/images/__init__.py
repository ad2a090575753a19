"""Images as inputs: decoding, tables, sources of image files, and demonstration sets."""
