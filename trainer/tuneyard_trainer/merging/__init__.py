"""Models made from the weights of others: which tensors, with which parts, by which arithmetic."""
