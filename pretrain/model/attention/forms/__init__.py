"""The forms of attention, a module each: ``NAME.py`` registers the form that ``attention: NAME`` runs.

A new form is a new module here and no other edit: :mod:`pretrain.model.attention.registry` lists this folder. Modules
whose name begins with an underscore are no forms. This file stays free of imports, so that listing loads nothing.
"""
