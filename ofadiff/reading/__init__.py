"""Files that others wrote: JSON, tensors and names in them, read or refused in one sentence."""
