"""Parts of image encoders."""
