"""HTTP servers of chat, pictures and rewards; it imports rl, pipelines and what is below them."""
