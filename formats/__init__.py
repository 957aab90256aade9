"""How rows, chats, models, tensors and folders stand in files."""
