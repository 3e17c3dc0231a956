"""Kinds of denoisers: one file for each says how it is called."""
