"""What training and evaluation read: images, texts and shards of them."""
