"""penstock in other people's frameworks, one module each.

A module here may import the framework that it is named after; nothing else of penstock imports it.
"""
