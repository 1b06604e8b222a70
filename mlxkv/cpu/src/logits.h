// What is asked of rows of logits [..., V] in every step.
#pragma once

#include "op.h"

// The largest of each row: float32 [...]; NaN where one is.
mx::array largest(const mx::array& logits);

// Where a row's largest lies, uint32 [...]: the first place; 0 where a NaN is in the row.
mx::array first_largest(const mx::array& logits);
