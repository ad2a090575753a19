"""The training step: state, loss of a batch, update, refreshes, embedding."""
