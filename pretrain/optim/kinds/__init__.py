"""One module for each kind of optimizer; :data:`pretrain.optim.kind.KINDS` finds them by listing this folder."""
