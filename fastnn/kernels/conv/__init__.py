"""``fastnn::conv_relu_max_pool`` on a GPU: the plan of a call, its launch, and the Triton kernels."""
