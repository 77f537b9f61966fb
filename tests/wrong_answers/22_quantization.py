# %% 1 · forgets what the group shares
bits = [4, 4, 4, 8]
# %% 1 · counts one number for a scale and a zero
bits = [4.5, 4.125, 4.25, 8 + 16 / 2048]
# %% 1 · takes numbers of 32 bits
bits = [6, 4.5, 4.5, 8 + 32 / 2048]
# %% 1 · adds the scale to each weight
bits = [36, 36, 20, 24]
# %% 1 · forgets that a row's scale counts too
bits = [5, 4.25, 4.25, 8]
# %% 1 · gives (c) a zero
bits = [5, 4.25, 4.5, 8 + 16 / 2048]
# %% 1 · gives three answers
bits = [5, 4.25, 4.25]
# %% 1 · answers in words
bits = ["5", "4.25", "4.25", "8"]


# %% 2 · one code too many: -8 … 8
def quantize(weight, bits):
    most = 2 ** (bits - 1)
    scales = (weight.abs().amax(1) / most).clamp(min=1e-30)
    return (weight / scales[:, None]).round(), scales


# %% 2 · all values on each side of zero
def quantize(weight, bits):
    most = 2**bits - 1
    scales = (weight.abs().amax(1) / most).clamp(min=1e-30)
    return (weight / scales[:, None]).round(), scales


# %% 2 · cuts instead of rounding
def quantize(weight, bits):
    most = 2 ** (bits - 1) - 1
    scales = (weight.abs().amax(1) / most).clamp(min=1e-30)
    return (weight / scales[:, None]).trunc(), scales


# %% 2 · a scale for each column
def quantize(weight, bits):
    most = 2 ** (bits - 1) - 1
    scales = (weight.abs().amax(0) / most).clamp(min=1e-30)
    return (weight / scales).round(), scales


# %% 2 · one scale for the matrix
def quantize(weight, bits):
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().max() / most
    return (weight / scale).round(), scale.expand(len(weight))


# %% 2 · forgets the sign of the largest
def quantize(weight, bits):
    most = 2 ** (bits - 1) - 1
    scales = (weight.amax(1) / most).clamp(min=1e-30)
    return (weight / scales[:, None]).round(), scales


# %% 2 · forgets the sign and clips the codes
def quantize(weight, bits):
    most = 2 ** (bits - 1) - 1
    scales = (weight.amax(1) / most).clamp(min=1e-30)
    return (weight / scales[:, None]).round().clamp(-most, most), scales


# %% 2 · divides a row of zeros by zero
def quantize(weight, bits):
    scales = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    return (weight / scales[:, None]).round(), scales


# %% 2 · keeps the last axis of the scales
def quantize(weight, bits):
    most = 2 ** (bits - 1) - 1
    scales = (weight.abs().amax(1, keepdim=True) / most).clamp(min=1e-30)
    return (weight / scales).round(), scales


# %% 2 · always eight bits
def quantize(weight, bits):
    codes, scales = quantize_int8(weight)
    return codes.float(), scales


# %% 2 · forgets to round
def quantize(weight, bits):
    most = 2 ** (bits - 1) - 1
    scales = (weight.abs().amax(1) / most).clamp(min=1e-30)
    return weight / scales[:, None], scales


# %% 2 · returns the codes only
def quantize(weight, bits):
    most = 2 ** (bits - 1) - 1
    scales = (weight.abs().amax(1) / most).clamp(min=1e-30)
    return (weight / scales[:, None]).round()


# %% 3 · the others are zero
def bad_row():
    row = torch.zeros(64)
    row[0] = 1.0
    return row


# %% 3 · an outlier that is not far enough out
def bad_row():
    row = torch.ones(64)
    row[0] = 200.0
    return row


# %% 3 · an outlier in each half
def bad_row():
    row = torch.linspace(0.5, 1.0, 64)
    row[0] = row[40] = 300.0
    return row


# %% 3 · no outlier
def bad_row():
    return torch.linspace(0.5, 1.0, 64)


# %% 3 · random weights and a large one
def bad_row():
    row = torch.randn(64, generator=torch.Generator().manual_seed(0))
    row[0] = 10.0
    return row


# %% 3 · infinity
def bad_row():
    row = torch.ones(64)
    row[0] = float("inf")
    return row


# %% 3 · a matrix
def bad_row():
    row = torch.ones(1, 64)
    row[0, 0] = 300.0
    return row


# %% 3 · a list
def bad_row():
    return [300.0] + [1.0] * 63


# %% 3 · an outlier, and small weights beside middling ones in the other half
def bad_row():
    row = torch.linspace(0.001, 1.0, 64).flip(0)
    row[0] = 300.0
    return row
