"""``fastnn::rnn`` on a GPU: the plan of a call, its launch, and the Triton kernels."""
