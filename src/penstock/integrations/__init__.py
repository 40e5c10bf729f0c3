"""penstock in other people's frameworks, one module or folder each.

What is here may import the framework that it is named after; nothing else of penstock imports it.
"""
