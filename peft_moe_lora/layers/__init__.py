"""The layers that an adapter puts in place of experts modules and routers.

May import parallel, config, functional, experts, files and below.
"""
