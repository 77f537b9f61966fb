# %% 1 · counts one row of patches
answer = (6, 1840, 16)
# %% 1 · forgets the positions
answer = (36, 10 * 147 + 10, 16)
# %% 1 · forgets the biases
answer = (36, 10 * 147 + 360, 16)
# %% 1 · forgets the colours
answer = (36, 10 * 49 + 10 + 360, 16)
# %% 1 · takes x for the row
answer = (36, 1840, 4 * 6 + 2)
# %% 1 · counts from 1
answer = (36, 1840, 17)
# %% 1 · one weight a pixel for all outputs
answer = (36, 147 + 10 + 360, 16)
# %% 1 · gives the number of pixels
answer = (42 * 42, 1840, 16)
# %% 1 · two numbers
answer = (36, 1840)


# %% 2 · forgets the bias
def embed_by_hand(pixel_values, weight, bias, table):
    size, side = weight.shape[-1], pixel_values.shape[-1] // weight.shape[-1]
    grid = pixel_values.reshape(-1, 3, side, size, side, size)
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, 3 * size * size)
    return patches @ weight.flatten(1).T + table


# %% 2 · forgets the positions
def embed_by_hand(pixel_values, weight, bias, table):
    size, side = weight.shape[-1], pixel_values.shape[-1] // weight.shape[-1]
    grid = pixel_values.reshape(-1, 3, side, size, side, size)
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, 3 * size * size)
    return patches @ weight.flatten(1).T + bias


# %% 2 · only reshapes
def embed_by_hand(pixel_values, weight, bias, table):
    patches = pixel_values.reshape(len(pixel_values), len(table), -1)
    return patches @ weight.flatten(1).T + bias + table


# %% 2 · pixels in the order line, dot, channel
def embed_by_hand(pixel_values, weight, bias, table):
    size, side = weight.shape[-1], pixel_values.shape[-1] // weight.shape[-1]
    grid = pixel_values.reshape(-1, 3, side, size, side, size)
    patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, 3 * size * size)
    return patches @ weight.flatten(1).T + bias + table


# %% 2 · columns before rows
def embed_by_hand(pixel_values, weight, bias, table):
    size, side = weight.shape[-1], pixel_values.shape[-1] // weight.shape[-1]
    grid = pixel_values.reshape(-1, 3, side, size, side, size)
    patches = grid.permute(0, 4, 2, 1, 3, 5).reshape(-1, side * side, 3 * size * size)
    return patches @ weight.flatten(1).T + bias + table


# %% 2 · splits the side the wrong way round
def embed_by_hand(pixel_values, weight, bias, table):
    size, side = weight.shape[-1], pixel_values.shape[-1] // weight.shape[-1]
    grid = pixel_values.reshape(-1, 3, size, side, size, side)
    patches = grid.permute(0, 3, 5, 1, 2, 4).reshape(-1, side * side, 3 * size * size)
    return patches @ weight.flatten(1).T + bias + table


# %% 2 · the kernel's lines and dots swapped
def embed_by_hand(pixel_values, weight, bias, table):
    size, side = weight.shape[-1], pixel_values.shape[-1] // weight.shape[-1]
    grid = pixel_values.reshape(-1, 3, side, size, side, size)
    patches = grid.permute(0, 2, 4, 1, 5, 3).reshape(-1, side * side, 3 * size * size)
    return patches @ weight.flatten(1).T + bias + table


# %% 2 · channels first
def embed_by_hand(pixel_values, weight, bias, table):
    size, side = weight.shape[-1], pixel_values.shape[-1] // weight.shape[-1]
    grid = pixel_values.reshape(-1, 3, side, size, side, size)
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, 3 * size * size)
    return (patches @ weight.flatten(1).T + bias + table).transpose(1, 2)


# %% 2 · the first row of the table for all
def embed_by_hand(pixel_values, weight, bias, table):
    size, side = weight.shape[-1], pixel_values.shape[-1] // weight.shape[-1]
    grid = pixel_values.reshape(-1, 3, side, size, side, size)
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, 3 * size * size)
    return patches @ weight.flatten(1).T + bias + table[0]


# %% 3 · reshapes there
def resize_positions(table, side):
    old = round(len(table) ** 0.5)
    grid = table.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
    return grid.flatten(2)[0].T


# %% 3 · reshapes back
def resize_positions(table, side):
    old = round(len(table) ** 0.5)
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
    return grid.reshape(side * side, -1)


# %% 3 · reshapes both ways
def resize_positions(table, side):
    old = round(len(table) ** 0.5)
    grid = table.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
    return grid.reshape(side * side, -1)


# %% 3 · swaps rows and columns
def resize_positions(table, side):
    old = round(len(table) ** 0.5)
    grid = table.reshape(1, old, old, -1).permute(0, 3, 2, 1)
    grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
    return grid.flatten(2)[0].T


# %% 3 · aligns the corners
def resize_positions(table, side):
    old = round(len(table) ** 0.5)
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=True)
    return grid.flatten(2)[0].T


# %% 3 · nearest
def resize_positions(table, side):
    old = round(len(table) ** 0.5)
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, (side, side))[0].flatten(1).T


# %% 3 · bicubic
def resize_positions(table, side):
    old = round(len(table) ** 0.5)
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, (side, side), mode="bicubic")[0].flatten(1).T


# %% 3 · stretches the list as one line
def resize_positions(table, side):
    return F.interpolate(table.T[None], side * side, mode="linear")[0].T


# %% 3 · repeats the table
def resize_positions(table, side):
    return table.repeat(side * side // len(table), 1)


# %% 2 · embeds the first picture only
def embed_by_hand(pixel_values, weight, bias, table):
    size = weight.shape[-1]
    side = pixel_values.shape[-1] // size
    grid = pixel_values[0].reshape(3, side, size, side, size).permute(1, 3, 0, 2, 4)
    one = grid.reshape(side * side, -1) @ weight.flatten(1).T + bias + table
    return one.expand(len(pixel_values), *one.shape)


# %% 3 · rows and columns change places on the way there
def resize_positions(table, side):
    old = round(len(table) ** 0.5)
    grid = table.reshape(1, old, old, -1).permute(0, 3, 2, 1)
    return F.interpolate(grid, (side, side), mode="bilinear").flatten(2)[0].T
