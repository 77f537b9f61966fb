# %% 1 · only moving forward counts as a move
answer = "a"
# %% 1 · a mirror keeps the distance
answer = "acd"
# %% 1 · doubling keeps the order
answer = "abd"
# %% 1 · negative positions are not allowed
answer = "ac"
# %% 1 · what changes instead of what stays
answer = "bce"
# %% 1 · everything stays
answer = "abcde"
# %% 1 · words instead of letters
answer = "add and subtract"


# %% 2 · pairs neighbours
def rotation_matrix(position, head_dim, base=10000.0):
    R = torch.zeros(head_dim, head_dim)
    for i in range(head_dim // 2):
        angle = position * base ** (-2 * i / head_dim)
        a, b = 2 * i, 2 * i + 1
        R[a, a], R[a, b] = math.cos(angle), -math.sin(angle)
        R[b, a], R[b, b] = math.sin(angle), math.cos(angle)
    return R


# %% 2 · turns clockwise
def rotation_matrix(position, head_dim, base=10000.0):
    half, R = head_dim // 2, torch.zeros(head_dim, head_dim)
    for i in range(half):
        angle = position * base ** (-2 * i / head_dim)
        j = i + half
        R[i, i], R[i, j] = math.cos(angle), math.sin(angle)
        R[j, i], R[j, j] = -math.sin(angle), math.cos(angle)
    return R


# %% 2 · both sines have one sign
def rotation_matrix(position, head_dim, base=10000.0):
    half, R = head_dim // 2, torch.zeros(head_dim, head_dim)
    for i in range(half):
        angle = position * base ** (-2 * i / head_dim)
        j = i + half
        R[i, i], R[i, j] = math.cos(angle), math.sin(angle)
        R[j, i], R[j, j] = math.sin(angle), math.cos(angle)
    return R


# %% 2 · forgets the 2 in the exponent
def rotation_matrix(position, head_dim, base=10000.0):
    half, R = head_dim // 2, torch.zeros(head_dim, head_dim)
    for i in range(half):
        angle = position * base ** (-i / head_dim)
        j = i + half
        R[i, i], R[i, j] = math.cos(angle), -math.sin(angle)
        R[j, i], R[j, j] = math.sin(angle), math.cos(angle)
    return R


# %% 2 · every pair turns alike
def rotation_matrix(position, head_dim, base=10000.0):
    half, R = head_dim // 2, torch.zeros(head_dim, head_dim)
    for i in range(half):
        j = i + half
        R[i, i], R[i, j] = math.cos(position), -math.sin(position)
        R[j, i], R[j, j] = math.sin(position), math.cos(position)
    return R


# %% 2 · ignores the base
def rotation_matrix(position, head_dim, base=10000.0):
    half, R = head_dim // 2, torch.zeros(head_dim, head_dim)
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / head_dim)
        j = i + half
        R[i, i], R[i, j] = math.cos(angle), -math.sin(angle)
        R[j, i], R[j, j] = math.sin(angle), math.cos(angle)
    return R


# %% 2 · ignores the position
def rotation_matrix(position, head_dim, base=10000.0):
    half, R = head_dim // 2, torch.zeros(head_dim, head_dim)
    for i in range(half):
        angle = base ** (-2 * i / head_dim)
        j = i + half
        R[i, i], R[i, j] = math.cos(angle), -math.sin(angle)
        R[j, i], R[j, j] = math.sin(angle), math.cos(angle)
    return R


# %% 2 · counts in degrees
def rotation_matrix(position, head_dim, base=10000.0):
    half, R = head_dim // 2, torch.zeros(head_dim, head_dim)
    for i in range(half):
        angle = math.radians(position * base ** (-2 * i / head_dim))
        j = i + half
        R[i, i], R[i, j] = math.cos(angle), -math.sin(angle)
        R[j, i], R[j, j] = math.sin(angle), math.cos(angle)
    return R


# %% 2 · one pair's matrix
def rotation_matrix(position, head_dim, base=10000.0):
    c, s = math.cos(position), math.sin(position)
    return torch.tensor([[c, -s], [s, c]])


# %% 2 · only the cosines and sines of position times frequency on the diagonal
def rotation_matrix(position, head_dim, base=10000.0):
    angle = position * base ** (-2 * torch.arange(head_dim // 2) / head_dim)
    return torch.diag(torch.cat((angle.cos(), angle.sin())))


# %% 2 · gives what it does to a vector of ones
def rotation_matrix(position, head_dim, base=10000.0):
    return rope_loop(torch.ones(head_dim), position, base)


# %% 3 · leaves everything where it is
def half_order(head_dim):
    return torch.arange(head_dim)


# %% 3 · the way back
def half_order(head_dim):
    return torch.arange(head_dim).view(2, -1).T.flatten()


# %% 3 · y before x
def half_order(head_dim):
    channels = torch.arange(head_dim)
    return torch.cat((channels[1::2], channels[0::2]))


# %% 3 · swaps the halves
def half_order(head_dim):
    return torch.arange(head_dim).roll(head_dim // 2)


# %% 3 · only the even ones
def half_order(head_dim):
    return torch.arange(0, head_dim, 2)


# %% 3 · reversed
def half_order(head_dim):
    return torch.arange(head_dim).flip(0)


# %% 3 · a list
def half_order(head_dim):
    return [*range(0, head_dim, 2), *range(1, head_dim, 2)]


# %% 3 · pairs right, but in the opposite order
def half_order(head_dim):
    channels = torch.arange(head_dim)
    return torch.cat((channels[0::2].flip(0), channels[1::2].flip(0)))


# %% 3 · the order as numbers with a point
def half_order(head_dim):
    return torch.cat((torch.arange(0.0, head_dim, 2), torch.arange(1.0, head_dim, 2)))
