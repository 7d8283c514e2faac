"""Mixture-of-Experts vision models that hold under attack."""
