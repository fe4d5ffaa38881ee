"""Quantization after training: ranges of activations, scales of weights, and where Q and DQ nodes stand."""
