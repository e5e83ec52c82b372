"""The evaluation tasks: a module or a folder each, which registers itself (see ``eval.task``). Nothing lists them."""
