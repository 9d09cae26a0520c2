"""What a model's linears are given while it draws: statistics that quantizers weigh errors by, and files of them."""
