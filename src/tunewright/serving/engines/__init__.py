"""The engines that a gateway can stand before: one protocol, and what speaks it."""
