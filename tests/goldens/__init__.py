"""Golden results: the values, gradients and run states of one commit, to compare with another's."""
