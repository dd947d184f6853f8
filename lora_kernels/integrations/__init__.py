"""Bridges to libraries that people train with; each module imports the library it is named after."""
