# %% 1 · leaves out the padded rows
prefix_lm_pairs = 7 * 7 + 8 + 9 + 10
causal_pairs = 55

# %% 1 · a padded token sees only itself
prefix_lm_pairs = 7 * 7 + 8 + 9 + 10 + 2
causal_pairs = 55

# %% 1 · a padded token sees the prefix and not itself
prefix_lm_pairs = 7 * 7 + 8 + 9 + 10 + 2 * 7
causal_pairs = 55

# %% 1 · everything sees everything real
prefix_lm_pairs = 10 * 10
causal_pairs = 55

# %% 1 · takes only the image tokens for the prefix
prefix_lm_pairs = 4 * 4 + sum(range(5, 11)) + 2 * 5
causal_pairs = 55

# %% 1 · a causal mask without the diagonal
prefix_lm_pairs = 92
causal_pairs = 45

# %% 1 · a causal mask over all twelve
prefix_lm_pairs = 92
causal_pairs = 78

# %% 1 · forgets the second number
prefix_lm_pairs = 92
causal_pairs = None

# %% 1 · a tensor instead of a number
prefix_lm_pairs = torch.tensor(92)
causal_pairs = 55


# %% 2 · trusts everybody
def is_right(make_mask):
    return True


# %% 2 · trusts nobody
def is_right(make_mask):
    return False


# %% 2 · knows no padding
def is_right(make_mask):
    real, types = torch.tensor([[1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]])
    mask = make_mask(real, types, 4)[0, 0]
    return torch.equal(mask, mask_loop(real[0], types[0]))


# %% 2 · compares what a padded token sees
def is_right(make_mask):
    real, types = torch.tensor([[0, 1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 1]])
    mask = make_mask(real, types, 5)[0, 0]
    return torch.equal(mask, mask_loop(real[0], types[0]))


# %% 2 · one suffix token has no future
def is_right(make_mask):
    real, types = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1]])
    mask = make_mask(real, types, 4)[0, 0]
    return torch.equal(mask[1:], mask_loop(real[0], types[0])[1:])


# %% 2 · one prefix token has nothing later to see
def is_right(make_mask):
    real, types = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]])
    mask = make_mask(real, types, 4)[0, 0]
    return torch.equal(mask[1:], mask_loop(real[0], types[0])[1:])


# %% 2 · looks at the number of pairs only, without the pads
def is_right(make_mask):
    real, types = torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 1]])
    return int(make_mask(real, types, 3).sum()) == 7


# %% 2 · returns a tensor
def is_right(make_mask):
    real, types = torch.tensor([[0, 1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 1]])
    mask = make_mask(real, types, 5)[0, 0]
    return (mask[1:] == mask_loop(real[0], types[0])[1:]).all()


# %% 3 · forgets the segments
def packed_mask(segments, types):
    place = torch.arange(segments.shape[1])
    real = (segments > 0)[:, None, :] & (segments > 0)[:, :, None]
    return real & ((types == 0)[:, None, :] | (place <= place[:, None]))


# %% 3 · padding is a segment of its own
def packed_mask(segments, types):
    place = torch.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return same & ((types == 0)[:, None, :] | (place <= place[:, None]))


# %% 3 · causal inside an example
def packed_mask(segments, types):
    place = torch.arange(segments.shape[1])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    return same & (place <= place[:, None])


# %% 3 · everything inside an example
def packed_mask(segments, types):
    return (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]


# %% 3 · asks for the type of the one who looks
def packed_mask(segments, types):
    place = torch.arange(segments.shape[1])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    return same & ((types == 0)[:, :, None] | (place <= place[:, None]))


# %% 3 · rows and columns exchanged
def packed_mask(segments, types):
    place = torch.arange(segments.shape[1])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    return same & ((types == 0)[:, None, :] | (place >= place[:, None]))


# %% 3 · an axis for the heads
def packed_mask(segments, types):
    place = torch.arange(segments.shape[1])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    return (same & ((types == 0)[:, None, :] | (place <= place[:, None])))[:, None]


# %% 3 · whole numbers
def packed_mask(segments, types):
    place = torch.arange(segments.shape[1])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    return (same & ((types == 0)[:, None, :] | (place <= place[:, None]))).int()


# %% 3 · only the pairs of the suffix are kept apart
def packed_mask(segments, types):
    j = torch.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    real = (segments > 0)[:, None, :] & (segments > 0)[:, :, None]
    return real & ((types == 0)[:, None, :] | (same & (j <= j[:, None])))


# %% 2 · asks only whether the future is hidden
def is_right(make_mask):
    real, types = torch.tensor([[0, 1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 1]])
    mask = make_mask(real, types, 5)[0, 0]
    return not bool(mask[3, 4]) and not bool(mask[1, 3])


# %% 1 · two numbers in one
prefix_lm_pairs = (92, 55)
causal_pairs = None
