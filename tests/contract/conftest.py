from importlib.util import find_spec

# The client library's own column has no arq, and so no tests of it.
collect_ignore = [] if find_spec("arq") else ["test_arq.py"]
