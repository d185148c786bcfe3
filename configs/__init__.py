"""What to train, a file for each recipe; importing one loads no JAX. It imports training, shapes and what is below them."""
