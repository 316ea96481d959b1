"""What is special to each architecture that is trained, as data: a file each, and the registry that names them."""
