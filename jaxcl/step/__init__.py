"""What one training step is: state, loss of a batch, update, refreshes, embedding."""
