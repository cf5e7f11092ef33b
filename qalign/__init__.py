"""qalign: preference alignment on one consumer GPU, with every role an adapter on one 4-bit base."""

__version__ = "0.1.0"
