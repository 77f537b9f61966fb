# %% 1 · drops the word that crosses p
a, b, c = 1, 1, 1

# %% 1 · keeps one too many
a, b, c = 3, 2, 2

# %% 1 · does not share the mass anew after top-k
a, b, c = 2, 2, 1

# %% 1 · forgets the temperature
a, b, c = 2, 1, 2

# %% 1 · takes T = 0.5 for the root of the probabilities
a, b, c = 2, 1, 3

# %% 1 · answers two of three
a, b, c = 2, 1, None

# %% 1 · counts those that go
a, b, c = 3, 4, 4

# %% 1 · gives the mass kept
a, b, c = 0.7, 1.0, 0.769


# %% 2 · an absolute threshold
def keep_min_p(logits, min_p):
    return logits.masked_fill(logits.softmax(-1) < min_p, -torch.inf)


# %% 2 · a ratio of logits
def keep_min_p(logits, min_p):
    return logits.masked_fill(logits < min_p * logits.amax(-1, keepdim=True), -torch.inf)


# %% 2 · forgets the logarithm
def keep_min_p(logits, min_p):
    gap = logits - logits.amax(-1, keepdim=True)
    return logits.masked_fill(gap < min_p, -torch.inf)


# %% 2 · the largest of the whole batch
def keep_min_p(logits, min_p):
    gap = logits - logits.amax()
    return logits.masked_fill(gap < torch.tensor(min_p).log() - 1e-6, -torch.inf)


# %% 2 · keeps the unlikely ones
def keep_min_p(logits, min_p):
    gap = logits - logits.amax(-1, keepdim=True)
    return logits.masked_fill(gap > torch.tensor(min_p).log() - 1e-6, -torch.inf)


# %% 2 · returns the gaps
def keep_min_p(logits, min_p):
    gap = logits - logits.amax(-1, keepdim=True)
    return gap.masked_fill(gap < torch.tensor(min_p).log() - 1e-6, -torch.inf)


# %% 2 · returns probabilities
def keep_min_p(logits, min_p):
    p = logits.softmax(-1)
    return p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)


# %% 2 · writes into what it was given
def keep_min_p(logits, min_p):
    gap = logits - logits.amax(-1, keepdim=True)
    logits[gap < torch.tensor(min_p).log() - 1e-6] = -torch.inf
    return logits


# %% 2 · a logarithm to base 10
def keep_min_p(logits, min_p):
    gap = logits - logits.amax(-1, keepdim=True)
    return logits.masked_fill(gap < torch.tensor(min_p).log10() - 1e-6, -torch.inf)


# %% 2 · a mask
def keep_min_p(logits, min_p):
    gap = logits - logits.amax(-1, keepdim=True)
    return gap >= torch.tensor(min_p).log() - 1e-6


# %% 3 · trusts everybody
def is_right(keep):
    return True


# %% 3 · trusts nobody
def is_right(keep):
    return False


# %% 3 · only asks that something is left
def is_right(keep):
    logits = torch.tensor([[0.15, 0.40, 0.05, 0.30, 0.10]]).log()
    return bool(keep(logits, 0.3).isfinite().any())


# %% 3 · in falling order already
def is_right(keep):
    logits = torch.tensor([[0.40, 0.30, 0.15, 0.10, 0.05]]).log()
    return keep(logits, 0.6).isfinite().tolist() == [[True, True, False, False, False]]


# %% 3 · counts only
def is_right(keep):
    logits = torch.tensor([[0.15, 0.40, 0.05, 0.30, 0.10]]).log()
    return int(keep(logits, 0.6).isfinite().sum()) == 2


# %% 3 · only the easy question
def is_right(keep):
    logits = torch.tensor([[0.05, 0.90, 0.05]]).log()
    return keep(logits, 0.5).isfinite().tolist() == [[False, True, False]]


# %% 3 · everything is kept
def is_right(keep):
    logits = torch.tensor([[0.15, 0.40, 0.05, 0.30, 0.10]]).log()
    return torch.equal(keep(logits, 1.0), logits)


# %% 3 · the mass reaches p, however many that takes
def is_right(keep):
    logits = torch.tensor([[0.15, 0.40, 0.05, 0.30, 0.10]]).log()
    kept = keep(logits, 0.6).isfinite()
    return bool(logits.softmax(-1)[kept].sum() >= 0.6)


# %% 3 · returns a tensor
def is_right(keep):
    logits = torch.tensor([[0.15, 0.40, 0.05, 0.30, 0.10]]).log()
    return (keep(logits, 0.6).isfinite() == torch.tensor([[0, 1, 0, 1, 0]]).bool()).all()


# %% 2 · strictly more than the threshold
def keep_min_p(logits, min_p):
    p = logits.softmax(-1)
    return logits.masked_fill(p <= min_p * p.amax(-1, keepdim=True), -torch.inf)


# %% 3 · looks whether the most likely token stays
def is_right(keep):
    logits = torch.tensor([[0.15, 0.40, 0.05, 0.30, 0.10]]).log()
    return bool(keep(logits, 0.3).isfinite()[0, 1])
