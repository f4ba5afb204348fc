"""From a topology to running processes: the only package that knows every part."""
