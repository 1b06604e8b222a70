// All that needs MLX's headers, in one unit: reading them is most of a build.
#include "module.cpp"
// After Python.h.
#include "attention.cpp"
#include "logits.cpp"
#include "op.cpp"
#include "low_rank.cpp"
#include "weights.cpp"
#include "products.cpp"
#include "embed.cpp"
#include "step.cpp"
#include "quantize.cpp"
