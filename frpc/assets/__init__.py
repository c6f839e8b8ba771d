"""The bundled net and digits of `frpc demo`, and the script that makes them."""
