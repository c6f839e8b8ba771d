// Explains a sample in C++ with a package that frpc.export.aoti wrote:
//
//     explain PACKAGE INPUT SHAPE CLASS OUTPUT
//
// INPUT and OUTPUT hold float32 numbers, little-endian; SHAPE is that of the batch, 2x3x224x224. The class is that of every sample.

#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

std::vector<int64_t> read_shape(const std::string& text) {
  std::vector<int64_t> shape;
  std::stringstream parts(text);
  for (std::string part; std::getline(parts, part, 'x');) shape.push_back(std::stoll(part));
  return shape;
}

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "usage: explain PACKAGE INPUT SHAPE CLASS OUTPUT\n";
    return 2;
  }
  c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);

  const auto shape = read_shape(argv[3]);
  auto x = torch::empty(shape);
  std::ifstream(argv[2], std::ios::binary).read(static_cast<char*>(x.data_ptr()), x.nbytes());
  const auto target = torch::full({shape[0]}, std::stoll(argv[4]), torch::kInt64);

  std::vector<torch::Tensor> given{x, target};
  const auto found = loader.run(given);  // output, relevance, bias
  const auto relevance = found[1].contiguous();
  std::ofstream(argv[5], std::ios::binary).write(static_cast<const char*>(relevance.data_ptr()), relevance.nbytes());

  const auto score = found[0].select(1, target[0].item<int64_t>());
  std::cout << "score " << score[0].item<float>() << ", sum of the map " << relevance[0].sum().item<float>() << "\n";
}
