// Reads a training step's program: its stages, each the ops' own forward and backward, called one after another.
#pragma once

#include <memory>

#include "training_stages_image.h"
#include "training_stages_row.h"

namespace fastnn {

template <class T>
std::vector<std::unique_ptr<Stage<T>>> read_stages(const std::string& program) {
  std::vector<std::unique_ptr<Stage<T>>> stages;
  Words words(program);
  while (!words.ends()) {
    const std::string name = words.word();
    if (name == "conv") {
      stages.push_back(std::make_unique<ConvStage<T>>(words));
    } else if (name == "plain_conv") {
      stages.push_back(std::make_unique<PlainConvStage<T>>(words));
    } else if (name == "batch_norm") {
      stages.push_back(std::make_unique<BatchNormStage<T>>(words));
    } else if (name == "mlp") {
      stages.push_back(std::make_unique<MlpStage<T>>(words));
    } else if (name == "rnn") {
      stages.push_back(std::make_unique<RnnStage<T>>(words));
    } else if (name == "average") {
      stages.push_back(std::make_unique<AverageStage<T>>(words));
    } else if (name == "last") {
      stages.push_back(std::make_unique<LastStage<T>>(words));
    } else if (name == "activation") {
      stages.push_back(std::make_unique<ActivationStage<T>>(words));
    } else if (name == "dropout") {
      stages.push_back(std::make_unique<DropoutStage<T>>(words));
    } else {
      FASTNN_CHECK(name == "flatten", kTrainingStep, ": the program has no stage \"", name, "\"");
      stages.push_back(std::make_unique<FlattenStage<T>>(words));
    }
  }
  FASTNN_CHECK(!stages.empty(), kTrainingStep, ": expected at least one stage");
  return stages;
}

}  // namespace fastnn
