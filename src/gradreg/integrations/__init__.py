"""Adapters for frameworks that own the training loop: a page each, imported only by whoever uses that framework."""
