"""frpc in other libraries, and models and photos from them."""
