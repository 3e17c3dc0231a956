"""Joint training of a supernet: data, losses, distillation, checkpoints and the loop."""
