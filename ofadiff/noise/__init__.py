"""How clean samples become noisy: the forward processes that denoisers were trained with."""
