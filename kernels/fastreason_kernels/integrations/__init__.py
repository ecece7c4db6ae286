"""Drop-ins for other trainers: modules that repeat the names and the arguments of the packages they stand in for.

They own the translation of names, shapes and options. They refuse to hold kernels or loss arithmetic of their own, and to
import the package they imitate: only `trl.patch_trl` does, when it is called.
"""
