"""Configuration: texts, files and environment variables become one checked value.

It must not know: pools, runtimes, drivers' insides.
"""
