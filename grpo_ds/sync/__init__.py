"""Weights of the policy -> engines, in place."""
