# %% 1 · bits of our own grid
answers = [112, 4, 32]

# %% 1 · codes, not bits
answers = [64, 4, 32]

# %% 1 · bits of one code
answers = [10, 4, 32]

# %% 1 · halves the number of codes
answers = [640, 8, 32]

# %% 1 · forgets the fifth layer
answers = [640, 16, 32]

# %% 1 · the cell's column
answers = [640, 4, 16]

# %% 1 · the row of cells, not of pixels
answers = [640, 4, 2]

# %% 1 · two numbers
answers = [640, 4]

# %% 1 · one number
answers = 640

# %% 1 · a guess
answers = [6400, 4, 32]

# %% 1 · words
answers = ["640", "4", "32"]


# %% 2 · no gradient at all
def quantise(z, table):
    return table.detach()[torch.cdist(z, table.expand(len(z), -1, -1)).argmin(-1)]


# %% 2 · the gradient goes to the table
def quantise(z, table):
    return table[torch.cdist(z, table.expand(len(z), -1, -1)).argmin(-1)]


# %% 2 · the bracket the wrong way round
def quantise(z, table):
    e = table[torch.cdist(z, table.expand(len(z), -1, -1)).argmin(-1)]
    return e + (z - e).detach()


# %% 2 · detaches nothing
def quantise(z, table):
    e = table[torch.cdist(z, table.expand(len(z), -1, -1)).argmin(-1)]
    return z + (e - z)


# %% 2 · detaches only z
def quantise(z, table):
    e = table[torch.cdist(z, table.expand(len(z), -1, -1)).argmin(-1)]
    return z + (e - z.detach())


# %% 2 · the farthest row
def quantise(z, table):
    e = table[torch.cdist(z, table.expand(len(z), -1, -1)).argmax(-1)]
    return z + (e - z).detach()


# %% 2 · the largest product instead of the smallest distance
def quantise(z, table):
    e = table[(z @ table.T).argmax(-1)]
    return z + (e - z).detach()


# %% 2 · the numbers of the rows
def quantise(z, table):
    return torch.cdist(z, table.expand(len(z), -1, -1)).argmin(-1)


# %% 2 · returns z
def quantise(z, table):
    return z


# %% 2 · twice the gradient
def quantise(z, table):
    e = table[torch.cdist(z, table.expand(len(z), -1, -1)).argmin(-1)]
    return 2 * z + (e - 2 * z).detach()


# %% 3 · changes what it was given
def try_codes(codec, codes, mask, at):
    best, kept = -1, 0
    for code in range(codec.codes):
        codes[at] = code
        fit = mask_iou(codec.decode(codes[None])[0] > 0, mask)
        if fit > best:
            best, kept = fit, code
    codes[at] = kept
    return codes


# %% 3 · changes nothing
def try_codes(codec, codes, mask, at):
    return codes.clone()


# %% 3 · the worst
def try_codes(codec, codes, mask, at):
    trials = codes.repeat(codec.codes, 1)
    trials[:, at] = torch.arange(codec.codes)
    return trials[mask_iou(codec.decode(trials) > 0, mask).argmin()]


# %% 3 · only the number
def try_codes(codec, codes, mask, at):
    trials = codes.repeat(codec.codes, 1)
    trials[:, at] = torch.arange(codec.codes)
    return int(mask_iou(codec.decode(trials) > 0, mask).argmax())


# %% 3 · all sixteen
def try_codes(codec, codes, mask, at):
    codes = codes.clone()
    for k in range(16):
        trials = codes.repeat(codec.codes, 1)
        trials[:, k] = torch.arange(codec.codes)
        codes = trials[mask_iou(codec.decode(trials) > 0, mask).argmax()]
    return codes


# %% 3 · tries half of the codebook
def try_codes(codec, codes, mask, at):
    trials = codes.repeat(64, 1)
    trials[:, at] = torch.arange(64)
    return trials[mask_iou(codec.decode(trials) > 0, mask).argmax()]


# %% 3 · a threshold at a half
def try_codes(codec, codes, mask, at):
    trials = codes.repeat(codec.codes, 1)
    trials[:, at] = torch.arange(codec.codes)
    return trials[mask_iou(codec.decode(trials) > 0.9, mask).argmax()]


# %% 3 · a batch of one
def try_codes(codec, codes, mask, at):
    trials = codes.repeat(codec.codes, 1)
    trials[:, at] = torch.arange(codec.codes)
    best = mask_iou(codec.decode(trials) > 0, mask).argmax()
    return trials[best : best + 1]
