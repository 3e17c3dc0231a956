"""Files: folders that are replaced as a whole, safetensors, and what ties the files of a supernet together."""
