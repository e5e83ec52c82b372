"""Errors of what is computed: attention in 16 bits, the masked form on smooth inputs, a gradient norm in float32."""
